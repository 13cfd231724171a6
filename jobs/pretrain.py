"""The stage pretrain as a Ray job: `ray job submit … -- python jobs/pretrain.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["pretrain", *sys.argv[1:]]))
