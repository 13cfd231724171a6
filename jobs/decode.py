"""The stage decode as a Ray job: `ray job submit … -- python jobs/decode.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["decode", *sys.argv[1:]]))
