"""`ray job submit … -- python jobs/decode.py --recipe NAME --storage URL`: the stage decode, as `hubert-ray decode`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["decode", *sys.argv[1:]]))
