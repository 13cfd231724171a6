"""`ray job submit … -- python jobs/pretrain.py --recipe NAME --storage URL`: the stage pretrain, as `hubert-ray pretrain`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["pretrain", *sys.argv[1:]]))
