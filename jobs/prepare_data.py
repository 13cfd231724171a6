"""The stage prepare_data as a Ray job: `ray job submit … -- python jobs/prepare_data.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["prepare_data", *sys.argv[1:]]))
