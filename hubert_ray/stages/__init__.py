"""One file per stage of the recipe; each reads like the paper. A stage turns sealed artifacts into one sealed artifact."""
