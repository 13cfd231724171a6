"""`ray job submit … -- python jobs/measure_layers.py --recipe NAME --storage URL`: the stage measure_layers, as `hubert-ray measure_layers`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["measure_layers", *sys.argv[1:]]))
