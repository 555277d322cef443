/* The contender `rabbitmq-c`: the fastest request and reply that the C library gives, with one message for each call.
 *
 *     rabbitmq worker NAMESPACE PREFETCH
 *     rabbitmq client NAMESPACE PREFETCH
 *
 * It works as the other contenders do: parameters {"x":i,"y":1} and a result in JSON, as many calls in flight as asked,
 * and each reply matched to its call by the correlation ID. The worker holds at most PREFETCH requests, and acknowledges
 * after its replies, all of what it has read at once with one frame. It leaves out: confirms at both ends, `mandatory`,
 * deadlines, and all validation but that of the two numbers. A failure ends the program.
 *
 * Client and worker have one thread, one connection and one channel. While one of them handles what it has read, its
 * socket is corked: the kernel sends what it writes meanwhile in large segments, as a library with a buffer would.
 *
 * The broker is in RPCQ_URL, with the vhost by name. Commands and reports are lines of JSON, as in processes.py; the
 * measurement is that of load.py. Build it with: cc -O2 rabbitmq.c -lrabbitmq
 */

#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHANNEL 1
#define PATIENCE 60 /* seconds without any reply, after which the client fails */

static amqp_connection_state_t connection;
static int descriptor;
static char requests[256]; /* the name of the queue of requests */

_Noreturn static void fail(const char *format, ...) {
  va_list values;
  va_start(values, format);
  fputs("rabbitmq-c: ", stderr);
  vfprintf(stderr, format, values);
  fputc('\n', stderr);
  va_end(values);
  exit(1);
}

static void check(amqp_rpc_reply_t reply, const char *what) {
  if (reply.reply_type == AMQP_RESPONSE_LIBRARY_EXCEPTION)
    fail("%s failed: %s", what, amqp_error_string2(reply.library_error));
  if (reply.reply_type != AMQP_RESPONSE_NORMAL) fail("%s failed: the broker refused it", what);
}

static void check_status(int status, const char *what) {
  if (status != AMQP_STATUS_OK) fail("%s failed: %s", what, amqp_error_string2(status));
}

static double seconds_of(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void set_option(int option, int value) {
  if (setsockopt(descriptor, IPPROTO_TCP, option, &value, sizeof value)) fail("setsockopt: %s", strerror(errno));
}

static void connect_to(char *url, int prefetch) {
  struct amqp_connection_info info;
  check_status(amqp_parse_url(url, &info), "reading RPCQ_URL");
  connection = amqp_new_connection();
  amqp_socket_t *socket = amqp_tcp_socket_new(connection);
  if (!socket) fail("no memory for a socket");
  check_status(amqp_socket_open(socket, info.host, info.port), "connecting");
  check(amqp_login(connection, info.vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, info.user, info.password), "login");
  descriptor = amqp_get_sockfd(connection);
  set_option(TCP_NODELAY, 1);
  amqp_channel_open(connection, CHANNEL);
  check(amqp_get_rpc_reply(connection), "opening a channel");
  amqp_basic_qos(connection, CHANNEL, 0, (uint16_t)prefetch, 0);
  check(amqp_get_rpc_reply(connection), "setting the prefetch");
}

/* Declare a queue and consume it. A name of "" lets the broker choose one, for this connection alone. */
static amqp_bytes_t consume(const char *name, int no_ack) {
  int own = !*name;
  amqp_queue_declare_ok_t *declared = amqp_queue_declare(connection, CHANNEL, amqp_cstring_bytes(name), 0, !own, own,
                                                         !own, amqp_empty_table);
  check(amqp_get_rpc_reply(connection), "declaring a queue");
  amqp_bytes_t queue = amqp_bytes_malloc_dup(declared->queue);
  amqp_basic_consume(connection, CHANNEL, queue, amqp_empty_bytes, 0, no_ack, 0, amqp_empty_table);
  check(amqp_get_rpc_reply(connection), "consuming");
  return queue;
}

/* The next message. It waits for it, so that something should be known to come. */
static void read_message(amqp_envelope_t *envelope) {
  struct timeval timeout = {PATIENCE, 0};
  check(amqp_consume_message(connection, envelope, &timeout, 0), "waiting for a message");
}

static int more_was_read(void) { return amqp_frames_enqueued(connection) || amqp_data_in_buffer(connection); }

/* The text as a string, cut if it does not fit. */
static const char *as_string(amqp_bytes_t text, char *buffer, size_t size) {
  size_t length = text.len < size ? text.len : size - 1;
  memcpy(buffer, text.bytes, length);
  buffer[length] = 0;
  return buffer;
}

static void publish(amqp_bytes_t queue, const amqp_basic_properties_t *properties, const char *body) {
  check_status(amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, queue, 0, 0, properties,
                                  amqp_cstring_bytes(body)),
               "publishing");
}

/* Answer what comes, until standard input ends. */
static void work(void) {
  consume(requests, 0);
  printf("{\"event\": \"ready\", \"versions\": {\"rabbitmq-c\": \"%s\"}}\n", amqp_version());
  fflush(stdout);
  for (;;) {
    struct pollfd sources[] = {{.fd = descriptor, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    if (!more_was_read() && poll(sources, 2, -1) < 0) fail("poll: %s", strerror(errno));
    if (sources[1].revents) return;
    uint64_t last;
    set_option(TCP_CORK, 1);
    do {
      amqp_envelope_t envelope;
      read_message(&envelope);
      char body[128], end;
      int64_t x, y;
      const char *text = as_string(envelope.message.body, body, sizeof body);
      if (sscanf(text, " { \"x\" : %" SCNd64 " , \"y\" : %" SCNd64 " } %c", &x, &y, &end) != 2)
        fail("no parameters: %s", text);
      snprintf(body, sizeof body, "%" PRId64, x + y);
      amqp_basic_properties_t properties = {
          ._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_CORRELATION_ID_FLAG,
          .content_type = amqp_cstring_bytes("application/json"),
          .correlation_id = envelope.message.properties.correlation_id,
      };
      publish(envelope.message.properties.reply_to, &properties, body);
      last = envelope.delivery_tag;
      amqp_destroy_envelope(&envelope);
    } while (more_was_read());
    check_status(amqp_basic_ack(connection, CHANNEL, last, 1), "acknowledging");
    set_option(TCP_CORK, 0);
    amqp_maybe_release_buffers(connection);
  }
}

struct call {
  int64_t number;
  double called;
  int warm;
};

static int64_t next_number;

static void call(struct call *it, long place, amqp_bytes_t reply_to) {
  char body[64], id[64];
  it->number = next_number++;
  it->called = seconds_of(CLOCK_MONOTONIC);
  snprintf(body, sizeof body, "{\"x\":%" PRId64 ",\"y\":1}", it->number);
  snprintf(id, sizeof id, "%ld-%" PRId64, place, it->number);
  amqp_basic_properties_t properties = {
      ._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_CORRELATION_ID_FLAG | AMQP_BASIC_REPLY_TO_FLAG,
      .content_type = amqp_cstring_bytes("application/json"),
      .correlation_id = amqp_cstring_bytes(id),
      .reply_to = reply_to,
  };
  publish(amqp_cstring_bytes(requests), &properties, body);
}

/* The call that a message answers, whose answer is right. */
static struct call *answered(const amqp_message_t *message, struct call *calls, long count) {
  char id[64], body[64], *end;
  long place;
  int64_t number;
  as_string(message->properties.correlation_id, id, sizeof id);
  if (sscanf(id, "%ld-%" SCNd64, &place, &number) != 2 || place < 0 || place >= count || calls[place].number != number)
    fail("a reply to no call: %s", id);
  as_string(message->body, body, sizeof body);
  if (strtoll(body, &end, 10) != number + 1 || *end) fail("%" PRId64 " + 1 is not %s", number, body);
  calls[place].number = -1; /* a second reply would be one to no call */
  return &calls[place];
}

static int by_size(const void *one, const void *other) {
  double a = *(const double *)one, b = *(const double *)other;
  return (a > b) - (a < b);
}

/* The nearest rank, as in load.py. */
static void print_percentile(const char *name, const double *ordered, size_t count, double share) {
  if (count)
    printf("\"%s\": %.9f, ", name, ordered[(size_t)ceil(share * (double)count) - 1]);
  else
    printf("\"%s\": NaN, ", name);
}

static void say(const char *event) {
  printf("{\"event\": \"%s\"}\n", event);
  fflush(stdout);
}

static void measure(amqp_bytes_t reply_to, long in_flight, double warm_up, double seconds) {
  enum { WARMING, MEASURING, STOPPING } phase = WARMING;
  size_t count = 0, room = 1 << 20;
  struct call *calls = calloc((size_t)in_flight, sizeof *calls);
  double *latencies = malloc(room * sizeof *latencies);
  if (!calls || !latencies) fail("no memory for %ld calls", in_flight);
  double began = seconds_of(CLOCK_MONOTONIC), took = 0, cpu = 0;
  long cold = in_flight, waiting = in_flight;
  set_option(TCP_CORK, 1);
  for (long place = 0; place < in_flight; place++) call(&calls[place], place, reply_to);
  set_option(TCP_CORK, 0);
  while (waiting) {
    struct pollfd source = {.fd = descriptor, .events = POLLIN};
    if (!more_was_read() && poll(&source, 1, PATIENCE * 1000) != 1) fail("no reply within %d s", PATIENCE);
    set_option(TCP_CORK, 1);
    do {
      amqp_envelope_t envelope;
      read_message(&envelope);
      double now = seconds_of(CLOCK_MONOTONIC);
      struct call *it = answered(&envelope.message, calls, in_flight);
      amqp_destroy_envelope(&envelope);
      if (phase == MEASURING && now - began >= seconds) {
        phase = STOPPING;
        took = now - began;
        cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        say("stop");
      } else if (phase == MEASURING) {
        if (count == room && !(latencies = realloc(latencies, (room *= 2) * sizeof *latencies)))
          fail("no memory for the latencies of %zu calls", room);
        latencies[count++] = now - it->called;
      } else if (phase == WARMING) {
        cold -= !it->warm;
        it->warm = 1;
        if (!cold && now - began >= warm_up) {
          phase = MEASURING;
          say("start");
          cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
          began = seconds_of(CLOCK_MONOTONIC);
        }
      }
      if (phase == STOPPING)
        waiting--;
      else
        call(it, it - calls, reply_to);
    } while (waiting && more_was_read());
    set_option(TCP_CORK, 0);
    amqp_maybe_release_buffers(connection);
  }
  qsort(latencies, count, sizeof *latencies, by_size);
  printf("{\"event\": \"result\", \"calls\": %zu, \"seconds\": %.9f, ", count, took);
  print_percentile("p50", latencies, count, 0.50);
  print_percentile("p99", latencies, count, 0.99);
  printf("\"cpu\": %.9f}\n", cpu);
  fflush(stdout);
  free(latencies);
  free(calls);
}

static double number_of(const char *line, const char *name) {
  const char *at = strstr(line, name);
  if (!at) fail("a command without %s: %s", name, line);
  return strtod(at + strlen(name), NULL);
}

/* Measure whenever a command says so, until standard input ends. */
static void drive(void) {
  amqp_bytes_t reply_to = consume("", 1);
  char line[256];
  say("ready");
  while (fgets(line, sizeof line, stdin))
    measure(reply_to, (long)number_of(line, "\"in_flight\": "), number_of(line, "\"warm_up\": "),
            number_of(line, "\"seconds\": "));
}

int main(int count, char **arguments) {
  char *url = getenv("RPCQ_URL");
  if (count != 4 || !url) fail("usage: RPCQ_URL=amqp://user:password@host:port/vhost rabbitmq ROLE NAMESPACE PREFETCH");
  snprintf(requests, sizeof requests, "%s.rabbitmq-c.add", arguments[2]);
  connect_to(url, atoi(arguments[3]));
  if (strcmp(arguments[1], "worker") == 0)
    work();
  else if (strcmp(arguments[1], "client") == 0)
    drive();
  else
    fail("ROLE is worker or client; got %s", arguments[1]);
  amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
  amqp_destroy_connection(connection);
  return 0;
}
