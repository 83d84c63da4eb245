"""What bench/throughput.py and bench/serve.py share: workloads, shapes, the correctness gate, rows and plots."""
