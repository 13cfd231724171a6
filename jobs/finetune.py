"""`ray job submit … -- python jobs/finetune.py --recipe NAME --storage URL`: the stage finetune, as `hubert-ray finetune`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["finetune", *sys.argv[1:]]))
