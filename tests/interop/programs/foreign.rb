# RabbitMQ's RPC tutorial in Ruby, with bunny: a client and a server of one bare number.
#
#     ruby foreign.rb client URL QUEUE NUMBER [NUMBER ...]
#     ruby foreign.rb server URL QUEUE
#
# It prints JSON lines, as pika_client.py and pika_server.py do.

require "bunny"
require "json"

$stdout.sync = true
role, url, name, *numbers = ARGV
connection = Bunny.new(url)
connection.start
channel = connection.create_channel

def fibonacci(n)
  before, last = 0, 1
  n.times { before, last = last, before + last }
  before
end

if role == "server"
  queue = channel.queue(name)
  puts({ ready: true }.to_json)
  queue.subscribe(block: true) do |_delivery, asked, body|
    channel.default_exchange.publish(
      fibonacci(body.to_i).to_s, routing_key: asked.reply_to, correlation_id: asked.correlation_id
    )
    puts({ body: body }.to_json)
  end
else
  replies = Queue.new
  own = channel.queue("", exclusive: true)
  own.subscribe { |_delivery, properties, body| replies << [properties.correlation_id, body] }
  numbers.each_with_index do |number, at|
    id = "ruby-#{at}"
    channel.default_exchange.publish(number, routing_key: name, reply_to: own.name, correlation_id: id)
    came, body = replies.pop
    raise "a reply to #{came}, not to #{id}" if came != id
    puts({ sent: number, reply: body }.to_json)
  end
  connection.close
end
