"""Hands a message to the SMTP server of `MAIL_SMTP`, and says what its answer means for the job."""

from __future__ import annotations

import contextlib
import os
import smtplib
from email.message import EmailMessage

from rpcq import GiveUp, RetryLater

SECONDS = 10.0
"""Seconds that each step of the dialogue may take."""

LATER = 5.0
"""Seconds to wait when the server asks for another time. Real servers that use greylisting want minutes."""


def write(kind: str, user_id: str, address: str, subject: str, text: str) -> EmailMessage:
    """Write an e-mail.

    Its Message-ID follows from what it is for: all attempts have the same one, so that what comes twice can be told to
    be one e-mail.
    """
    message = EmailMessage()
    message["From"] = "Shop <hello@shop.example>"
    message["To"] = address
    message["Subject"] = subject
    message["Message-ID"] = f"<{kind}.{user_id}@shop.example>"
    message.set_content(text)
    return message


def send(message: EmailMessage) -> None:
    """Send it: returns once the server has answered that it has the message.

    Raises:
        GiveUp: the server refuses this message or this address for good (5xx).
        RetryLater: the server asks for another time (450, 451).
        OSError, smtplib.SMTPException: anything else, such as a server that is away, or that refuses us rather than
            the message. The message may have arrived, if the connection was lost before the answer.

    """
    host, _, port = os.environ.get("MAIL_SMTP", "localhost:8025").rpartition(":")
    server = smtplib.SMTP(host, int(port), timeout=SECONDS)
    try:
        server.send_message(message)
        # The server has the message. Whatever becomes of the farewell, it must not be sent again for that.
        with contextlib.suppress(smtplib.SMTPException):
            server.quit()
    except smtplib.SMTPRecipientsRefused as error:
        ((code, answer),) = error.recipients.values()
        raise _meaning(code, answer, error) from error
    except (smtplib.SMTPSenderRefused, smtplib.SMTPDataError) as error:
        raise _meaning(error.smtp_code, error.smtp_error, error) from error
    finally:
        server.close()


def _meaning(code: int, answer: bytes | str, error: Exception) -> Exception:
    """What a reply code means (RFC 5321, 4.2.1): 5xx is for good, 4xx for now."""
    said = f"{code} {answer.decode(errors='replace') if isinstance(answer, bytes) else answer}"
    if code >= 500:
        return GiveUp(f"the mail server refuses it: {said}")
    return RetryLater(LATER) if code in (450, 451) else error
