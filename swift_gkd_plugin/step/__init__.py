"""One optimizer step without a back end: rows, sources, responses, encoding, teacher, counting, evaluation, checkpoints."""
