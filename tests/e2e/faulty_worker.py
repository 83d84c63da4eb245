"""tq_vllm.plugin.eval_worker on an engine that reads a wrong block: `python faulty_worker.py JOB.json RESULT.npz`."""

import engine

from tq_vllm.plugin.eval_worker import main

if __name__ == "__main__":
    engine.install_fault_point()
    engine.set_fault(None, "wrong block")
    main()
