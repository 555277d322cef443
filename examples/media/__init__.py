"""Pictures and videos: each upload becomes several files, each by a job of its own, and one notice at the end.

make example-media                              # a page at http://127.0.0.1:8000, a broker, workers

export RPCQ_URL=amqp://localhost/ MEDIA_FOLDER=media
rpcq worker examples.media.pictures:pictures --job-prefetch 1 &
rpcq worker examples.media.videos:videos --job-prefetch 1 &      # needs ffmpeg
rpcq worker examples.media.notices:notices &
uvicorn --factory examples.media.app:create_app
"""
