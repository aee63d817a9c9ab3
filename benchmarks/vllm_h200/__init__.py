"""A real vLLM server on the GPUs of one machine: its own reload, checkpoint-engine's extension, and
Weight bus, in one run on one engine.

    python -m benchmarks.vllm_h200 [--layers 48] [--tp 4] [--repetitions 5] [--only vllm_reload]
    python -m benchmarks.vllm_h200 --cpu                           # the same flow, without a GPU

Trainers, consumers, the link and the form of the results are those of `benchmarks.h200`; the engine
is a server of vLLM (`fleet.py`) that generates for requests all the time (`load.py`). After every
timed update, whoever made it, every rank compares every bit of its parameters with what the
version's bytes must be (`held.py`): nothing that moved them has a part in it.
"""
