"""The stage finetune as a Ray job: `ray job submit … -- python jobs/finetune.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["finetune", *sys.argv[1:]]))
