# RabbitMQ's RPC tutorial in Perl, with AnyEvent::RabbitMQ (Net::AMQP): a client and a server of one bare number.
#
#     perl foreign.pl client URL QUEUE NUMBER [NUMBER ...]
#     perl foreign.pl server URL QUEUE
#
# It prints JSON lines, as pika_client.py and pika_server.py do. Net::AMQP dies of types of headers that it does not know.

use strict;
use warnings;
use AnyEvent;
use AnyEvent::RabbitMQ;
use JSON::PP;

$| = 1;
my ($role, $url, $name, @numbers) = @ARGV;
my ($user, $password, $host, $port, $vhost) = $url =~ m{^amqp://(?:([^:@]*):([^@]*)@)?([^:/]+):?(\d*)/?(.*)$};
s/%([0-9A-Fa-f]{2})/chr hex $1/ge for grep { defined } $user, $password, $vhost;
my $end = AnyEvent->condvar;
my $failed = sub { warn "failed: @_\n"; exit 1 };
my $json = JSON::PP->new->canonical;

sub fibonacci {
    my ($before, $last) = (0, 1);
    ($before, $last) = ($last, $before + $last) for 1 .. shift;
    return $before;
}

sub serve {
    my $channel = shift;
    $channel->declare_queue(queue => $name, on_failure => $failed, on_success => sub {
        $channel->consume(
            queue => $name, no_ack => 1, on_failure => $failed,
            on_success => sub { print $json->encode({ready => JSON::PP::true}), "\n" },
            on_consume => sub {
                my $asked = shift;
                my $body = $asked->{body}->payload;
                $channel->publish(
                    exchange => '', routing_key => $asked->{header}->reply_to, body => fibonacci($body),
                    header => {correlation_id => $asked->{header}->correlation_id},
                );
                print $json->encode({body => "$body"}), "\n";
            },
        );
    });
}

sub ask {
    my $channel = shift;
    $channel->declare_queue(queue => '', exclusive => 1, on_failure => $failed, on_success => sub {
        my $own = shift->method_frame->queue;
        my $at = 0;
        my $next = sub {
            return $end->send if $at == @numbers;
            $channel->publish(
                exchange => '', routing_key => $name, body => $numbers[$at],
                header => {reply_to => $own, correlation_id => "perl-$at"},
            );
        };
        $channel->consume(
            queue => $own, no_ack => 1, on_failure => $failed, on_success => $next,
            on_consume => sub {
                my $reply = shift;
                $failed->("a reply to another request") if $reply->{header}->correlation_id ne "perl-$at";
                print $json->encode({sent => "$numbers[$at]", reply => $reply->{body}->payload}), "\n";
                $at++;
                $next->();
            },
        );
    });
}

my $rabbit = AnyEvent::RabbitMQ->new->load_xml_spec->connect(
    host => $host, port => $port || 5672, user => $user // 'guest', pass => $password // 'guest',
    vhost => $vhost eq '' ? '/' : $vhost, timeout => 10,
    on_failure => $failed, on_close => $failed, on_read_failure => $failed,
    on_success => sub {
        shift->open_channel(on_failure => $failed, on_close => $failed, on_success => $role eq 'server' ? \&serve : \&ask);
    },
);
$end->recv;
exit 0;
