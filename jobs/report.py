"""The stage report as a Ray job: `ray job submit … -- python jobs/report.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["report", *sys.argv[1:]]))
