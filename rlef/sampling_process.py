"""A process that only samples: it carries out the learners' orders, alone or with others of one engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rlef.bridge import Order, SamplersEnd
from rlef.config import Config, ConfigError
from rlef.engine_group import Calls, Follower
from rlef.faults import RunFault, Watch
from rlef.job import Job, leave
from rlef.own_rollouts import OwnRollouts, load_sampler
from rlef.ports import SamplingParams
from rlef.stopping import StopRequest
from rlef.words import Words


def sample(config: Config, job: Job) -> int:
    """What a process does that only samples: carry out the learners' orders. Returns the exit status."""
    with ExitStack() as stack:
        words = stack.enter_context(Words(job, silence_s=config.parallel.silence_s))
        watch = Watch(config, tell=words.enter, silent=words.silent)
        stack.enter_context(watch.phase("starting or stopping"))
        stack.enter_context(StopRequest(on_request=words.ask_to_stop))
        stack.callback(leave)
        calls = Calls(job, config, words) if job.engine_ranks > 1 else None
        if calls is None or calls.leads:
            _lead(config, stack, job, words, watch, calls)
        else:
            _follow(config, stack, job, words, watch, calls)
    return 0


@contextmanager
def _telling_what_is_refused() -> Iterator[None]:
    """Rank 0, which tells what the user must mend, may be ended before it hears of what this process met."""
    try:
        yield
    except ConfigError as error:
        raise RunFault(str(error)) from error


def _lead(
    config: Config, stack: ExitStack, job: Job, words: Words, watch: Watch, calls: Calls | None
) -> None:
    index, of = job.leaders.index(job.rank), len(job.leaders)
    with _telling_what_is_refused():
        own = OwnRollouts(config, stack, job=job, index=index, of=of, calls=calls)
    tell = calls.tell if calls is not None else lambda _: None
    bridge = SamplersEnd(job, config, words, own.shape, on_ready=lambda: tell("ready"))
    with words:  # so that others hear of a fault before this process tidies up
        while (order := bridge.next_order()).kind != "end":
            tell("order")
            with watch.phase(_phase_of(order)):
                _carry_out(order, own, bridge)
            words.enter("waiting for the learners")
        tell("order")
        bridge.ready()
    if calls is not None:
        calls.is_ending = True


def _follow(config: Config, stack: ExitStack, job: Job, words: Words, watch: Watch, calls: Calls) -> None:
    """As `_lead`, with the leader of this process's engine."""
    with _telling_what_is_refused():
        sampler, shape, _ = load_sampler(config, stack, job)
    bridge = SamplersEnd(job, config, words, shape)
    follower = Follower(sampler, calls, bridge)
    with words:
        there_is_more = calls.receive().name == "order"
        while there_is_more:
            order = bridge.next_order()
            with watch.phase(_phase_of(order)):
                there_is_more = follower.follow(order)


def _carry_out(order: Order, own: OwnRollouts, bridge: SamplersEnd) -> None:
    details = dict(order.details)
    match order.kind:
        case "start":
            saved, progress = bridge.take()
            with _telling_what_is_refused():
                own.start(**details, saved=saved, progress=progress)
        case "collect":
            bridge.reply(own.collect(**details))
        case "record":
            progress = own.record([bool(each) for each in details["solved"]])
            bridge.reply(progress if own.is_first else None)
        case "load":
            own.push(bridge.weights(details["dtype"]), details["version"])
        case "evaluate":
            params = SamplingParams(**details.pop("params"))
            numbers = range(*details.pop("numbers"))
            bridge.reply(own.evaluate_held_out(numbers=numbers, params=params, **details))
        case "save":
            bridge.reply(own.save())
        case _:
            raise AssertionError(f"no sampler knows the order {order}")


def _phase_of(order: Order) -> str:
    """The name of the phase, of which the first word says what it takes."""
    match order.kind:
        case "collect":
            return f"sampling step {order.details['step'] + 1}"
        case "load":
            return f"loading the weights of step {order.details['version']}"
        case "evaluate":
            return "evaluating"
        case "save":
            return "saving what is under way"
        case "record":
            return "recording outcomes"
        case "end":
            return "starting or stopping"
        case _:
            return "starting the episodes"
