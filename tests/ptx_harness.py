"""Small PTX kernels for tests of the interpreter, which so need no CUDA toolkit."""

import ml_dtypes
import numpy as np
from minires.kernels.interpreter import run

HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"
_DTYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": ml_dtypes.bfloat16, "pred": np.uint32}
_DTYPES |= {
    f"{letter}{bits}": np.dtype(f"{letter.replace('s', 'i').replace('b', 'u')}{bits // 8}")
    for letter in "usb"
    for bits in (8, 16, 32, 64)
}
_DTYPES |= {"f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32}


def dtype_of(kind):
    return np.dtype(_DTYPES[kind])


def entry(body, parameters, declared=""):
    """A kernel `k` with these parameters, as (type, name)."""
    listed = ", ".join(f".param .{kind} {name}" for kind, name in parameters)
    return f"{HEADER}\n{declared}\n.visible .entry k({listed})\n{{\n{body}\n}}\n"


def evaluate(instruction, sources, result, immediates=(), second=None):
    """Run `instruction` once per lane: lane i gets element i of each of `sources`, (type, array) pairs.

    result: the type of what it returns; "" for none. immediates: more operands, as text. second: the type of a second
    result, written d|p. Returns the array of results, or a pair of arrays.
    """
    n = len(sources[0][1])
    results = [kind for kind in (result, second) if kind]
    arrays = [np.ascontiguousarray(a, dtype_of(kind)) for kind, a in sources]
    outputs = [np.zeros(n, dtype_of(kind)) for kind in results]
    lines = [".reg .b32 %t; .reg .b64 %at; .reg .pred %flag; mov.u32 %t, %tid.x;"]
    for j, (kind, _) in enumerate(sources):
        lines += [_declare(f"%a{j}", kind), _address(f"p{j}", kind)]
        if kind == "pred":
            lines += [f".reg .b32 %w{j}; ld.global.u32 %w{j}, [%at]; setp.ne.u32 %a{j}, %w{j}, 0;"]
        else:
            lines += [f"ld.global.{_memory(kind)} %a{j}, [%at];"]
    lines += [_declare(f"%d{j}", kind) for j, kind in enumerate(results)]
    to = "|".join(f"%d{j}" for j in range(len(results)))
    lines += [f"{instruction} {', '.join([to, *[f'%a{j}' for j in range(len(sources))], *immediates])};"]
    for j, kind in enumerate(results):
        lines += [_address(f"q{j}", kind)]
        if kind == "pred":
            lines += [f".reg .b32 %v{j}; selp.u32 %v{j}, 1, 0, %d{j}; st.global.u32 [%at], %v{j};"]
        else:
            lines += [f"st.global.{_memory(kind)} [%at], %d{j};"]
    names = [f"p{j}" for j in range(len(arrays))] + [f"q{j}" for j in range(len(outputs))]
    run(entry("\n".join([*lines, "ret;"]), [("u64", name) for name in names]), "k", 1, n, [*arrays, *outputs])
    outputs = [o.astype(bool) if kind == "pred" else o for o, kind in zip(outputs, results, strict=True)]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _memory(kind):
    return {"bf16": "b16", "f16": "b16", "f16x2": "b32", "bf16x2": "b32", "tf32": "b32"}.get(kind, kind)


def _declare(name, kind):
    return f".reg .{'pred' if kind == 'pred' else f'b{max(16, 8 * dtype_of(kind).itemsize)}'} {name};"


def _address(parameter, kind):
    size = dtype_of(kind).itemsize
    offset = f"mul.wide.u32 %off, %t, {size}; add.s64 %at, %base, %off;"
    return f"{{ .reg .b64 %base, %off; ld.param.u64 %base, [{parameter}]; {offset} }}"
