"""A shop: orders, and services that react to them by themselves.

make example-shop                             # a page at http://127.0.0.1:8000, a broker, all services

export RPCQ_URL=amqp://localhost/ SHOP_DATABASE=postgresql+asyncpg://shop@localhost/shop
python -m examples.shop.setup                 # tables, stock, and the queues of all services
rpcq worker examples.shop.payment:payment &   # and so on, for each service
uvicorn --factory examples.shop.app:create_app
"""
