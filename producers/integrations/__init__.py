"""Publishers in the shape that trainers call: `hooks` for loops, `transformers` for `Trainer`."""
