"""From a job and its parameters to a message: what is checked before anything is sent. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rpcq.contracts import METHOD_NAME, RemoteCallable, RemoteJob
from rpcq.errors import ConfigurationError, InvalidParams, UsageError
from rpcq.options import CallOptions, check_name
from rpcq.service import Method, jobs_of
from rpcq.wire import bodies
from rpcq.wire.jobs import JobMessage, check_headers


def find_job(target: str | Callable[..., Any]) -> tuple[str, str, Method | RemoteJob | None]:
    """The service and the name of a job, and the job itself if the target is its function, or of a bound contract.

    Raises:
        ConfigurationError: the name is not valid.
        UsageError: the target is not a job, or one of several services.

    """
    if isinstance(target, str):
        service, _, name = target.rpartition(".")
        if not METHOD_NAME.match(name) or not service:
            raise ConfigurationError(f"a job must be named 'service.job'; got {target!r}")
        return check_name("the name of a service", service), name, None
    if isinstance(target, RemoteJob):
        return target.service, target.name, target
    # By label: a program may make a service again, and the newest job of a name counts.
    found = [*{job.label: job for job in jobs_of(target)}.values()] if callable(target) else []
    if len(found) != 1:
        raise UsageError(
            "send takes 'service.job', a function with @service.job, or a job of a bound contract; "
            f"got {target!r}: {_why_not_job(target, found)}"
        )
    return found[0].service, found[0].name, found[0]


def prepare(
    found: tuple[str, str, Method | RemoteJob | None],
    options: CallOptions,
    args: tuple[Any, ...],
    params: Mapping[str, Any],
    *,
    job_id: str,
    app_id: str,
    max_body: int,
) -> JobMessage:
    """The message of a job, without its times.

    Args:
        found: the service, the name of the job, and the job itself, which checks the parameters; see `find_job`.
        options: of these, `idempotency_key`, `metadata`, `priority` and `order_key` are used.
        args: parameters by position.
        params: parameters by name.
        job_id: its ID.
        app_id: the name of the program that sends it.
        max_body: the most bytes of parameters.

    Raises:
        InvalidParams: the parameters do not fit the job.
        NotSerializable: JSON cannot carry a parameter.
        TooLarge: parameters or headers are over the limit.
        TypeError: there are too many parameters by position, or one is given twice.
        UsageError: it has a priority, and its service has no lanes; or it has an order key, and its service is not
            ordered, or the job runs at most once.

    """
    _, name, method = found
    if not isinstance(params, Mapping):
        msg = f"send_many must have the parameters of each job by name, as in {{'to': 'ada'}}; got {params!r:.100}"
        raise InvalidParams(msg)
    if method is not None:
        args, params = method.parameters.by_name(args, params)
    body = bodies.encode_params(args, params, max_body)
    if method is not None:
        method.parameters.read(body)
    key = options.idempotency_key or job_id
    message = JobMessage(id=job_id, name=name, body=body, key=key, app_id=app_id, headers=options.metadata)
    if options.metadata:
        check_headers(options.metadata)
    if options.priority is not None:
        message.priority = options.priority
    message.order_key = options.order_key
    if isinstance(method, Method):
        _check_lane(message, method)
    return message


def _check_lane(message: JobMessage, method: Method) -> None:
    """Check that the service of a job has the lane that it is to go to."""
    of_service = f"for jobs of service {method.service!r}"
    if message.priority != "normal" and not method.lanes:
        msg = f"priority must not be {message.priority!r} {of_service}, which has no lanes"
        raise UsageError(f"{msg}: define it with Service(..., lanes=True), or send them without a priority")
    if message.order_key is None:
        return
    if not method.ordered:
        msg = f"order_key must not be given {of_service}, which is not ordered"
        raise UsageError(f"{msg}: define it with Service(..., ordered=True), or send them without an order key")
    if runs_at_most_once(method):
        msg = f"{method.label} runs at most once, and what a lane's worker has not begun comes again when it stops"
        raise UsageError(f"{msg}: send it without order_key, or define it without at_most_once")


def runs_at_most_once(method: Method | RemoteJob | None) -> bool:
    """Whether a job is known to run at most once; of a job by name, or of a contract, only its worker knows."""
    return isinstance(method, Method) and method.job is not None and method.job.at_most_once


def _why_not_job(target: Any, found: Sequence[Method]) -> str:
    if found:
        return f"it is a job of several services: send it by name, as one of {', '.join(job.label for job in found)}"
    if isinstance(target, RemoteCallable):
        return "it is a method: call it, do not send it"
    if (api := getattr(target, "__rpcq_api__", None)) is not None:
        return f"bind the contract first: client.send(client.bind({api.__name__}).{target.__name__}, ...)"
    return "it is not a job"
