"""Triton's interpreter without half of its work: it replaces the functions of its language anew for each function that a kernel calls
(Triton 3.9, runtime/interpreter.py, InterpretedFunction.__call__), though each launch has done so, or the first call for good."""

from triton.runtime import interpreter


def patch_once() -> None:
    done = set()

    def call(function, *args, **kwargs):
        if id(function.fn.__globals__) not in done:
            interpreter._patch_lang(function.fn)
            done.add(id(function.fn.__globals__))
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
