"""Where a run's files live and when they may be trusted. No torch, no Ray."""
