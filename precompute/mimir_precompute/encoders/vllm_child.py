"""The process in which vLLM runs, started by vllm_process.py: `python -m … ARGUMENTS FD`.

Reads lines of JSON from standard input: {"id", "prompt_ids"} adds a request, for the task "generate" with
"max_new_tokens" and "seed"; {"run": true} meets all of them. Writes lines of JSON to FD: {"ready": true}, one for each
request as it is finished, and {"alive": true} now and then while it works. A result of the task "generate" is {"id",
"token_ids", "cached"}; one of "hidden" is {"id", "dtype", "shape", "bytes"}, and so many raw bytes follow the line.
"""

import ctypes
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import numpy as np

_SIGN_OF_LIFE_S: Final = 2.0
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    arguments = json.loads(sys.argv[1])
    with open(int(sys.argv[2]), "wb") as results:
        # a killed parent takes this process along, and the GPU's memory with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        engine = _load(arguments)
        _tell(results, {"ready": True})
        for line in sys.stdin:
            message = json.loads(line)
            if "run" in message:
                _run(engine, results, _answer if arguments["task"] == "generate" else _rows)
            else:
                _add(engine, message, arguments)


def _load(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    # A block that is longer than the shared caption would hide the prefix from the cache; on CPUs 32 is the shortest.
    # A prompt cut into chunks has its random numbers set back, which vLLM cannot do on a CPU: the engine ends by it.
    on_cpu: dict[str, Any] = {
        "enforce_eager": True,
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, arguments["max_model_len"]),
    }
    # rows are wanted of every token, and as they leave the final norm
    pooling: dict[str, Any] = {}
    if arguments["task"] == "hidden":
        from vllm.config import PoolerConfig

        config = PoolerConfig(task="token_embed", tok_pooling_type="ALL", use_activation=False)
        pooling = {"runner": "pooling", "convert": "embed", "pooler_config": config}
    llm = LLM(
        arguments["model"],
        dtype=arguments["dtype"],
        max_model_len=arguments["max_model_len"],
        max_num_seqs=arguments["max_num_seqs"],
        enable_prefix_caching=arguments["prefix_caching"] and not pooling,
        tensor_parallel_size=arguments["tensor_parallel_size"],
        gpu_memory_utilization=arguments["gpu_memory_utilization"],
        skip_tokenizer_init=not pooling,  # its pooling takes token ids, and yet wants a tokenizer
        trust_remote_code=False,
        generation_config="vllm",  # no defaults of the model's own: variant 0 is greedy and nothing else
        seed=0,
        **(on_cpu if arguments["cpu"] else {}),
        **pooling,
    )
    return llm.llm_engine


def _add(engine: Any, message: dict[str, Any], arguments: dict[str, Any]) -> None:
    from vllm import PoolingParams, SamplingParams
    from vllm.inputs import TokensPrompt

    if arguments["task"] == "hidden":
        params = PoolingParams(task="token_embed", use_activation=False)
    else:
        sampled = message["seed"] is not None
        params = SamplingParams(
            temperature=arguments["temperature"] if sampled else 0.0,
            seed=message["seed"],
            max_tokens=message["max_new_tokens"],
            stop_token_ids=arguments["end_ids"],
            ignore_eos=True,  # stop_token_ids are all the ends there are, the model's own among them
            detokenize=False,
        )
    engine.add_request(str(message["id"]), TokensPrompt(prompt_token_ids=message["prompt_ids"]), params)


def _run(engine: Any, results: BinaryIO, result_of: Callable[[Any], tuple[dict[str, Any], bytes]]) -> None:
    told = time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                fields, payload = result_of(output)
                _tell(results, {"id": int(output.request_id), **fields}, payload)
        if time.monotonic() - told > _SIGN_OF_LIFE_S:
            told = time.monotonic()
            _tell(results, {"alive": True})


def _answer(output: Any) -> tuple[dict[str, Any], bytes]:
    return {"token_ids": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens or 0}, b""


def _rows(output: Any) -> tuple[dict[str, Any], bytes]:
    """One row a token, with no bit lost; vLLM hands out float32 whatever it computes in."""
    rows = np.ascontiguousarray(output.outputs.data, dtype="<f4")  # (n, H)
    halves = rows.view("<u2").reshape(*rows.shape, 2)
    is_bfloat16 = not halves[..., 0].any()
    payload = (halves[..., 1] if is_bfloat16 else rows).tobytes()
    return {"dtype": "bf16" if is_bfloat16 else "f32", "shape": rows.shape, "bytes": len(payload)}, payload


def _tell(results: BinaryIO, message: dict[str, Any], payload: bytes = b"") -> None:
    results.write(json.dumps(message).encode() + b"\n" + payload)
    results.flush()


if __name__ == "__main__":
    main()
