"""SGLang as an engine: a weight loader that SGLang calls in its workers, and the consumer's side.

Written from SGLang's source (0.5.6, 0.5.10, 0.5.15 and 0.5.23), and not yet run on a real SGLang.
"""
