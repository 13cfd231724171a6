"""The stage measure_layers as a Ray job: `ray job submit … -- python jobs/measure_layers.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["measure_layers", *sys.argv[1:]]))
