"""How it is carried: NATS subjects and streams, stores, presence, leases, the embedded server.

Start with `weightbus.bus.connection.open_bus`. Modules are imported one by one: `digest`
needs numpy, and a worker that only digests needs no NATS.
"""
