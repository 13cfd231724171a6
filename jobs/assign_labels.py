"""The stage assign_labels as a Ray job: `ray job submit … -- python jobs/assign_labels.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["assign_labels", *sys.argv[1:]]))
