"""The trainer's side: publisher, slots, shards, parts of several ranks, files.

Start with `weightbus.producers.publisher.open_publisher`, or `BlockingPublisher` of `blocking`.
Modules are imported one by one: publishing files needs no torch.
"""
