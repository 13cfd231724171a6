"""`ray job submit … -- python jobs/assign_labels.py --recipe NAME --storage URL`: the stage assign_labels, as `hubert-ray assign_labels`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["assign_labels", *sys.argv[1:]]))
