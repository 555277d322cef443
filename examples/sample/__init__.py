"""A shop: a service that keeps stock, one that takes orders, a web app, a report, and their tests.

export RPCQ_URL=amqp://localhost/
rpcq worker examples.sample.stock:stock examples.sample.orders:orders &
uvicorn examples.sample.app:app &
python -m examples.sample.report
"""
