"""The stage learn_kmeans as a Ray job: `ray job submit … -- python jobs/learn_kmeans.py --recipe NAME --storage URL`."""

import sys

from hubert_ray.cli import main

sys.exit(main(["learn_kmeans", *sys.argv[1:]]))
