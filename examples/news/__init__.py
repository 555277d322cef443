"""News by topic, to phones, mailboxes and browsers. Whoever was away gets what it missed.

make example-news                               # a page at http://127.0.0.1:8000, a broker, five services

export RPCQ_URL=amqp://localhost/ NEWS_FOLDER=.
python -m examples.news.setup                   # tables and queues
rpcq worker examples.news.editor:editor &
rpcq worker examples.news.mobile:mobile &
rpcq worker examples.news.emails:emails &
python -m examples.news.web --port 8001 &       # as many as you like
python -m examples.news --web 8001
"""
