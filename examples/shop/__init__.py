"""A shop: a service that keeps stock, one that takes orders, a web app, a report, and their tests.

export RPCQ_URL=amqp://localhost/
rpcq worker examples.shop.stock:stock examples.shop.orders:orders &
uvicorn examples.shop.app:app &
python -m examples.shop.report
"""
