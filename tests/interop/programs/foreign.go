// RabbitMQ's RPC tutorial in Go, with amqp091-go: a client and a server of one bare number.
//
//	foreign client URL QUEUE NUMBER [NUMBER ...]
//	foreign server URL QUEUE
//
// It prints JSON lines, as pika_client.py and pika_server.py do.
package main

import (
	"fmt"
	"log"
	"os"
	"strconv"

	amqp "github.com/rabbitmq/amqp091-go"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func fibonacci(n int) int {
	before, last := 0, 1
	for i := 0; i < n; i++ {
		before, last = last, before+last
	}
	return before
}

func main() {
	role, url, name, numbers := os.Args[1], os.Args[2], os.Args[3], os.Args[4:]
	connection, err := amqp.Dial(url)
	check(err)
	channel, err := connection.Channel()
	check(err)
	if role == "server" {
		_, err = channel.QueueDeclare(name, false, false, false, false, nil)
		check(err)
		asked, err := channel.Consume(name, "", false, false, false, false, nil)
		check(err)
		fmt.Println(`{"ready":true}`)
		for each := range asked {
			n, err := strconv.Atoi(string(each.Body))
			check(err)
			check(channel.Publish("", each.ReplyTo, false, false, amqp.Publishing{
				ContentType:   "text/plain",
				CorrelationId: each.CorrelationId,
				Body:          []byte(strconv.Itoa(fibonacci(n))),
			}))
			check(each.Ack(false))
			fmt.Printf("{\"body\":%q}\n", each.Body)
		}
		return
	}
	own, err := channel.QueueDeclare("", false, false, true, false, nil)
	check(err)
	replies, err := channel.Consume(own.Name, "", true, false, false, false, nil)
	check(err)
	for at, number := range numbers {
		id := fmt.Sprintf("go-%d", at)
		check(channel.Publish("", name, false, false, amqp.Publishing{
			ContentType: "text/plain", CorrelationId: id, ReplyTo: own.Name, Body: []byte(number),
		}))
		reply := <-replies
		if reply.CorrelationId != id {
			log.Fatalf("a reply to %s, not to %s", reply.CorrelationId, id)
		}
		fmt.Printf("{\"sent\":%q,\"reply\":%q}\n", number, reply.Body)
	}
	check(connection.Close())
}
