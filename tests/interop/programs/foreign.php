<?php
// RabbitMQ's RPC tutorial in PHP: a client with the extension amqp, and a server with php-amqplib, of one bare number.
//
//     php foreign.php client URL QUEUE NUMBER [NUMBER ...]
//     php foreign.php server URL QUEUE
//
// It prints JSON lines, as pika_client.py and pika_server.py do.

require_once 'PhpAmqpLib/autoload.php';

use PhpAmqpLib\Connection\AMQPStreamConnection;
use PhpAmqpLib\Message\AMQPMessage;

function fibonacci(int $n): int
{
    [$before, $last] = [0, 1];
    for ($i = 0; $i < $n; $i++) {
        [$before, $last] = [$last, $before + $last];
    }
    return $before;
}

[, $role, $url, $name] = $argv;
$numbers = array_slice($argv, 4);
$at = parse_url($url);
$port = $at['port'] ?? 5672;
$user = urldecode($at['user'] ?? 'guest');
$password = urldecode($at['pass'] ?? 'guest');
$vhost = urldecode(substr($at['path'] ?? '/', 1)) ?: '/';

if ($role === 'server') {
    $connection = new AMQPStreamConnection($at['host'], $port, $user, $password, $vhost);
    $channel = $connection->channel();
    $channel->queue_declare($name, false, false, false, false);
    $channel->basic_qos(null, 1, null);
    $channel->basic_consume($name, '', false, false, false, false, function (AMQPMessage $asked) {
        $reply = new AMQPMessage(
            (string) fibonacci((int) $asked->getBody()),
            ['correlation_id' => $asked->get('correlation_id')]
        );
        $asked->getChannel()->basic_publish($reply, '', $asked->get('reply_to'));
        $asked->ack();
        echo json_encode(['body' => $asked->getBody()]), "\n";
    });
    echo json_encode(['ready' => true]), "\n";
    while ($channel->is_open()) {
        $channel->wait();
    }
} else {
    $connection = new AMQPConnection(
        ['host' => $at['host'], 'port' => $port, 'login' => $user, 'password' => $password, 'vhost' => $vhost]
    );
    $connection->connect();
    $channel = new AMQPChannel($connection);
    $own = new AMQPQueue($channel);
    $own->setFlags(AMQP_EXCLUSIVE);
    $own->declareQueue();
    $exchange = new AMQPExchange($channel);
    foreach ($numbers as $index => $number) {
        $id = "php-$index";
        $exchange->publish($number, $name, AMQP_NOPARAM, ['reply_to' => $own->getName(), 'correlation_id' => $id]);
        $own->consume(function (AMQPEnvelope $reply) use ($number, $id) {
            if ($reply->getCorrelationId() !== $id) {
                throw new RuntimeException("a reply to {$reply->getCorrelationId()}, not to $id");
            }
            echo json_encode(['sent' => $number, 'reply' => $reply->getBody()]), "\n";
            return false;
        }, AMQP_AUTOACK);
        $own->cancel();
    }
}
