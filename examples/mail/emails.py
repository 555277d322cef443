"""The service that sends e-mails: one because it heard of a user, one because it is asked to.

Its handlers are `def`: they run in threads, and `smtplib` may block. The mail server wants few connections, and few
messages a second: `max_concurrency` and `rate` hold for each of the two, and for each worker.
"""

from __future__ import annotations

from examples.mail import smtp
from examples.mail.contracts import EmailsApi, UserCreated
from rpcq import Context, Retry, Service

emails = Service(api=EmailsApi)

RETRY = Retry(max_attempts=12, initial_backoff=1, max_backoff=3600)
"""A mail server may be away for hours."""


@emails.on(UserCreated, retry=RETRY, timeout=60, max_concurrency=2, rate="5/s")
def confirm(event: UserCreated) -> None:
    """Ask a new user to confirm the address."""
    text = f"Dear {event.name},\n\nis this your address? Then confirm it with this code:\n\n{event.user_id}\n"
    smtp.send(smtp.write("confirm", event.user_id, event.address, "Please confirm your address", text))


@emails.job(retry=RETRY, timeout=60, max_concurrency=2, rate="5/s")
def welcome(context: Context, user_id: str, name: str, address: str) -> None:
    """Welcome somebody who has confirmed the address."""
    text = f"Dear {name},\n\nwe are glad that you are here.\n"
    message = smtp.write("welcome", user_id, address, f"Welcome, {name}!", text)
    message["X-Attempt"] = str(context.attempt)
    smtp.send(message)
