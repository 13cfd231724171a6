"""`ray job submit … -- python jobs/prepare_data.py --recipe NAME --storage URL`: the stage prepare_data, as `hubert-ray prepare_data`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["prepare_data", *sys.argv[1:]]))
