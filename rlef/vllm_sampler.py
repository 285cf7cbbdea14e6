"""The sampler on vLLM, on GPUs and on its CPU build: the only file that imports vllm.

The engine runs in this process and is stepped from here, so that weights are handed over as tensors, between
two tokens. Where torch.distributed's default group has several ranks, each has its part of one engine, and
all make the same calls (`engine_group.py`). The prefix cache keeps the keys and values of earlier turns: a
later turn computes its feedback alone.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlef.config import ConfigError, VllmConfig
from rlef.ports import UNFINISHED, Draft, Request, Response, SamplingParams, generate_by_steps
from rlef.records import ModelShape
from rlef.shards import stage_weights

LEAST_TEMPERATURE = 0.01  # vLLM takes this for all that is lower, and not zero
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
VOCABULARY_PADDING = 64  # it makes of the vocabulary a multiple of this
_CPU_BLOCK = 32  # tokens of the cache's unit; its attention on CPUs wants multiples of 32
_CPU_STEP_TOKENS = 4096  # of prompts and responses in one forward pass
_OUTPUT = "lm_head.weight"
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine stays in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",  # model.path is a folder
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the executor and other ranks share the cores
    "TORCH_COMPILE_DISABLE": "1",  # compiling for a CPU takes longer than a small run
}


class VllmSampler:
    """`ports.StreamingSampler` for any model that vLLM knows. One at a time in a process.

    With `tensor_parallel` above 1 it starts workers of its own, unless the default group of torch.distributed
    has so many ranks: then this is one of them. Where that group is to have more than this process, it must
    be initialised before.
    """

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        *,
        end_token_id: int,
        context: int,
        slots: int,
        dialogs: int,
        settings: VllmConfig,
    ) -> None:
        """Of the model in `folder`, whose weights are not read: `push` brings them.

        `context` is the most tokens of a prompt and its response, `slots` how many responses are decoded at
        once, `dialogs` how many the cache should keep from turn to turn.
        """
        self._shape = shape
        self._end_token_id = end_token_id
        self._context = context
        self._version = -1
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self._has_workers = settings.tensor_parallel > 1 and ranks != settings.tensor_parallel
        self._drafts: dict[str, Draft] = {}  # under way, by vLLM's name for the request
        self._request_ids = map(str, itertools.count())
        self.cached_prompt_tokens = 0  # of all prompts so far: those whose keys and values were in the cache
        on_gpu = torch.cuda.is_available()
        self._owns_group = not torch.distributed.is_initialized()
        with _as_the_engine_wants(on_gpu=on_gpu, has_workers=self._has_workers):
            EngineArgs, LLMEngine = _import_engine()  # noqa: N806
            if ranks > 1 and not on_gpu:
                _leave_shared_memory_alone()
            arguments: dict[str, Any] = {"gpu_memory_utilization": settings.memory_fraction}
            if not on_gpu:
                workers = settings.tensor_parallel if self._has_workers else 1
                arguments = _cpu_arguments(
                    shape, settings, context=context, slots=slots, dialogs=dialogs, workers=workers
                )
            self._engine: Any = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(folder),
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # nothing of the folder's generation_config.json
                    dtype=settings.dtype,
                    max_model_len=context,
                    max_num_seqs=slots,
                    tensor_parallel_size=settings.tensor_parallel,
                    distributed_executor_backend="mp" if self._has_workers else _own_backend(),
                    enable_prefix_caching=True,
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    **arguments,
                )
            )

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """As in `ports.Sampler`. A response is a function of the weights, its request and `params`, except
        where two tokens are equally probable up to rounding.

        Raises:
            ValueError: a prompt does not fit, or a temperature is too low for vLLM.
        """
        if self._drafts:
            raise RuntimeError("responses are under way; take them by step(), or abort() them")
        return generate_by_steps(self, requests, params)

    def submit(self, request: Request, params: SamplingParams) -> None:
        from vllm import SamplingParams as EngineParams
        from vllm.sampling_params import RequestOutputKind

        self._require_weights()
        self._check(request, params)
        request_id = next(self._request_ids)
        self._engine.add_request(
            request_id,
            {"prompt_token_ids": list(request.token_ids)},
            EngineParams(
                temperature=params.temperature,
                top_p=params.top_p,
                seed=_request_seed(params.seed, request),
                max_tokens=min(
                    params.max_tokens - request.num_sampled, self._context - len(request.token_ids)
                ),
                stop_token_ids=[self._end_token_id],
                ignore_eos=True,  # the end-of-turn token alone ends a response
                logprobs=0 if params.temperature > 0 else None,  # of the chosen token
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,  # an aborted response keeps what it has
            ),
        )
        self._drafts[request_id] = Draft(request)

    def step(self) -> list[tuple[int, Response]]:
        if not self._drafts:
            return []
        self._require_weights()
        finished = []
        for output in self._engine.step():
            draft = self._drafts[output.request_id]
            self._extend(draft, output)
            if draft.finish_reason != UNFINISHED:
                del self._drafts[output.request_id]
                finished.append((draft.request.stream, draft.response()))
        return finished

    def abort(self) -> list[tuple[int, Response]]:
        self._engine.abort_request(list(self._drafts))
        begun = [(draft.request.stream, draft.response()) for draft in self._drafts.values()]
        self._drafts.clear()
        return begun

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As in `ports.Sampler`. The keys and values of what is under way are computed anew.

        Raises:
            ValueError: not the weights of a model of this shape. The sampler has none then.
        """
        self._version = -1
        incoming = _Incoming(self._shape, named_weights)
        if self._has_workers:  # weights travel to them as bytes
            whole = [(name, tensor.cpu()) for name, tensor in incoming]
            incoming.require_all()
            self._load(whole)
        else:
            self._load(incoming)
            incoming.require_all()
        if not self._engine.reset_prefix_cache(reset_running_requests=bool(self._drafts)):
            raise RuntimeError("vLLM did not give up its prefix cache, which is of the weights before")
        self._version = version

    def close(self) -> None:
        """Give back memory and process groups, so that this process may have another sampler."""
        from vllm.distributed import parallel_state

        self._engine.engine_core.shutdown()
        del self._engine
        parallel_state.destroy_model_parallel()
        if self._owns_group:
            parallel_state.destroy_distributed_environment()
        elif parallel_state._WORLD is not None:  # noqa: SLF001  the public function would end our group too
            parallel_state._WORLD.destroy()  # noqa: SLF001
            parallel_state._WORLD = None  # noqa: SLF001

    def _require_weights(self) -> None:
        if self._version < 0:
            raise RuntimeError("the sampler has no weights yet; push() them first")

    def _check(self, request: Request, params: SamplingParams) -> None:
        if 0 < params.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature {params.temperature} is too low for vLLM: use 0 or at least {LEAST_TEMPERATURE}"
            )
        if not 0 < len(request.token_ids) < self._context:
            raise ValueError(
                f"a prompt of {len(request.token_ids)} tokens does not fit the context of {self._context} "
                "tokens with room for a response; "
                "lower rollout.max_prompt_tokens, max_feedback_tokens or turns"
            )
        if any(draft.request.stream == request.stream for draft in self._drafts.values()):
            raise ValueError(f"stream {request.stream} is under way already; give each request its own")

    def _extend(self, draft: Draft, output: Any) -> None:
        if not draft.token_ids:
            self.cached_prompt_tokens += output.num_cached_tokens or 0
        (completion,) = output.outputs
        draft.token_ids += completion.token_ids
        if completion.logprobs is None:  # greedy: all mass is on the most probable token
            draft.logprobs += [0.0] * len(completion.token_ids)
        else:
            pairs = zip(completion.logprobs, completion.token_ids, strict=True)
            draft.logprobs += [chosen[token_id].logprob for chosen, token_id in pairs]
        draft.versions += [self._version] * len(completion.token_ids)
        draft.finish_reason = completion.finish_reason or UNFINISHED

    def _load(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights})
        if self._shape.tie_word_embeddings:
            self._engine.apply_model(_refresh_tied_output)


def _refresh_tied_output(model: nn.Module) -> None:
    """On a CPU the output layer multiplies by a packed copy, which a reload of the embedding leaves stale."""
    output: Any = model.lm_head
    if output.weight.device.type == "cpu":
        output.quant_method.process_weights_after_loading(output)


class _Incoming:
    """The weights of a push on their way, read to the end whatever is wrong: other ranks take part in it."""

    def __init__(self, shape: ModelShape, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        parts = stage_weights(shape, "logits", stage=0, stages=1)
        self._missing = {
            name: size for part in parts for name, size in zip(part.names, part.shapes, strict=True)
        }
        self._is_tied = shape.tie_word_embeddings
        self._named_weights = named_weights
        self._fault = ""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._named_weights:
            if name == _OUTPUT and self._is_tied:  # some checkpoints hold the embedding twice
                continue
            expected = self._missing.pop(name, None)
            if expected == tuple(tensor.shape):
                yield name, tensor.detach()
            elif expected is None:
                self._fault = self._fault or f"{name} is not a weight of this model, or came twice"
            else:
                self._fault = self._fault or f"{name} is {tuple(tensor.shape)}, not {expected}"

    def require_all(self) -> None:
        if self._missing and not self._fault:
            self._fault = f"{min(self._missing)} is missing"
        if self._fault:
            raise ValueError(f"pushed weights: {self._fault}; push those of the model that the sampler has")


def _request_seed(seed: int, request: Request) -> int:
    """Of 63 bits. Keyed by its start too: turns of a dialog, and what goes on after an abort, draw anew."""
    key = f"{seed} {request.stream} {len(request.token_ids)}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


def _own_backend() -> str:
    """Of an engine in this process: where it has a launcher, on the GPU that this gave it."""
    return "external_launcher" if "RANK" in os.environ else "uni"


def _cpu_arguments(
    shape: ModelShape, settings: VllmConfig, *, context: int, slots: int, dialogs: int, workers: int
) -> dict[str, Any]:
    cache_bytes = _cache_bytes(shape, settings, context=context, dialogs=max(slots, dialogs), workers=workers)
    return {
        "kv_cache_memory_bytes": cache_bytes,
        "block_size": _CPU_BLOCK,
        "enforce_eager": True,
        # After each part of a prompt it would rewind the request's seed, which fails on a CPU.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, slots, _CPU_STEP_TOKENS),
    }


def _cache_bytes(shape: ModelShape, settings: VllmConfig, *, context: int, dialogs: int, workers: int) -> int:
    """Of one rank's cache in this machine's memory: what its heads of `dialogs` whole ones take, or the share
    of one of this process's `workers`.

    Raises:
        ConfigError: the share is too small for one.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    heads = max(1, shape.num_key_value_heads // settings.tensor_parallel)  # fewer are shared by ranks
    numbers = 2 * shape.num_hidden_layers * heads * shape.head_dim
    block = _CPU_BLOCK * numbers * dtype.itemsize
    blocks = -(-context // _CPU_BLOCK)  # of a dialog; vLLM keeps one more for itself
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * workers
    share = int(memory * settings.memory_fraction) // processes
    if share < (blocks + 1) * block:
        raise ConfigError(
            f"vllm.memory_fraction = {settings.memory_fraction} leaves {share:,} bytes for the cache, and "
            f"one dialog of {context} tokens takes {(blocks + 1) * block:,}; raise it"
        )
    return min((dialogs * blocks + 1) * block, share)


def _import_engine() -> tuple[Any, Any]:
    """`EngineArgs` and `LLMEngine`.

    Raises:
        ConfigError: vllm is there, but not whole.
    """
    try:
        from vllm import EngineArgs, LLMEngine
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"rollout.sampler = 'vllm', but vllm cannot be imported ({str(error).splitlines()[0]}): beside a "
            "CPU build of torch, pip uninstall torchvision torchaudio torchcodec; else install the extra anew"
        ) from error
    return EngineArgs, LLMEngine


def _leave_shared_memory_alone() -> None:
    """On CPUs the ranks of an engine would meet in shared memory, under a name that all launched engines of a
    machine have alike, and that outlives them. Where ranks have different names, vLLM takes their group.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    _CPUSHMDistributed.make_group_name = staticmethod(lambda _: str(os.getpid()))


@contextmanager
def _as_the_engine_wants(*, on_gpu: bool, has_workers: bool) -> Iterator[None]:
    """The environment that vLLM reads; what it does to torch's threads on a CPU is undone."""
    for name, value in (_ENVIRONMENT if on_gpu else _ENVIRONMENT | _CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if has_workers:  # weights and functions travel to them pickled
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about what vLLM calls
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if not on_gpu:
            torch.set_num_threads(threads)
