"""`ray job submit … -- python jobs/report.py --recipe NAME --storage URL`: the stage report, as `hubert-ray report`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["report", *sys.argv[1:]]))
