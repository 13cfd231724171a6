"""`ray job submit … -- python jobs/run_recipe.py --recipe NAME --storage URL`: the whole chain, as `hubert-ray run`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
