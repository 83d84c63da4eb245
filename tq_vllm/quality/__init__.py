"""What a KV-cache format costs in quality, measured on the served model: text, tasks, metrics, runs."""
