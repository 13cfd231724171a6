"""`ray job submit … -- python jobs/learn_kmeans.py --recipe NAME --storage URL`: the stage learn_kmeans, as `hubert-ray learn_kmeans`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["learn_kmeans", *sys.argv[1:]]))
