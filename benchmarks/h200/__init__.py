"""Weight bus beside checkpoint-engine and beside the link, on the GPUs of one machine, in one run.

    python -m benchmarks.h200 [--layers 48] [--repetitions 5] [--only host_tp,gpu_tp]
    python -m benchmarks.h200 --cpu                                # the same flow, without a GPU
    python -m benchmarks.h200 --plot benchmarks/results/h200x2.json h200x2.png

All runs move the same tensors. Ours go through the whole product: an embedded NATS server, one
trainer process for each GPU (`trainer.py`), consumer processes (`consumer.py`), and engines whose
ranks are processes of their own (`engine.py`). What is timed begins with `CheckpointReady` being
sent and ends when the last rank's parameters are written. After every timed update each rank
compares every byte of its parameters with what the version's bytes must be (`weights.py`), which
it computes by itself: nothing that moved them has a part in it.
"""
