"""``swift-gkd doctor``: what can be known of an environment and of a training command without loading weights.

Nothing is checked twice: what a run checks before its models load is called here as it stands there (``hf/pipeline.py``,
``megatron/pipeline.py``, ``checks.py``, ``memory/``), and its refusal becomes a finding. What is looked at here alone ruins a run without
an error: see ``models.py`` and ``rows.py``.
"""
