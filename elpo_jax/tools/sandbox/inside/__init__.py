"""What runs on the other side: imported by the worker process alone, which knows nothing of the package around it."""
