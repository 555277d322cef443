"""Sustainability scores of products: heavy computation off the web's request path, with priorities and a schedule.

make example-scores                             # a page at http://127.0.0.1:8000, a broker, two workers

export RPCQ_URL=amqp://localhost/ SCORES_DATABASE=scores.sqlite
rpcq worker examples.scores.service:scores --job-prefetch 1 &
uvicorn --factory examples.scores.app:create_app
"""
