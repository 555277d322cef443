"""Confirmation and welcome e-mails through an SMTP server: throttled, retried, and buried when they bounce.

make example-mail                               # a page at http://127.0.0.1:8000, a broker, a mail server, services

export RPCQ_URL=amqp://localhost/ MAIL_SMTP=localhost:8025 MAIL_DATABASE=mail.sqlite MAIL_POSTBOX=postbox.sqlite
python -m examples.mail.postbox &               # the mail server
rpcq worker examples.mail.emails:emails &
rpcq worker examples.mail.billing:billing &
rpcq worker examples.mail.analytics:analytics &
uvicorn --factory examples.mail.app:create_app
"""
