package gateway

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"trireme.dev/services/gateway/media"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/sched"
)

// Config is what a gateway is started with. Zero values mean the defaults, which Run fills in.
type Config struct {
	HTTP      string   // address to listen on, e.g. 127.0.0.1:8080; port 0: a free one
	Admin     string   // address for operators (see admin.go); "": none
	NATSURL   string   // nats://host:port
	Keys      []string // of which a request has one, as Authorization: Bearer KEY; none: it needs none
	Origins   []string // of pages in browsers that may use the API, "*" for all; none: none may
	HMMSocket string   // path of the HMM's Unix socket
	ModelDir  string   // Hugging Face folder of the model; its weights are not loaded
	ModelName string   // name that clients use; "": the folder's
	Instance  string   // instance id; "": gateway and a random suffix

	MaxBody   int64        // bytes of a request body; 0 means 64 MiB
	MaxPixels int          // width times height of a picture; 0 means imageprep.DecodeLimit, which is also the most
	Media     media.Config // what is fetched for picture URLs

	MaxOpen   int           // requests in work at most; 0 means 1024
	MaxQueue  int           // requests waiting for capacity at most; 0 means 1024
	QueueWait time.Duration // longest wait for capacity; 0 means 30 s
	// What waits is put in order by priority, tenant and Policy (sched.Queue): fcfs, sjf or slo; "" means slo. Under slo, what
	// can no longer meet its targets is refused or goes last, as Late says; "" means LateLast.
	Policy        string
	Late          string
	Targets       sched.Targets      // of requests that state none and whose class has none of its own
	Classes       map[string]Class   // by name, beside or instead of default, priority and flex
	TenantWeights map[string]float64 // shares of tenants; one that is not named has 1
	// Ahead is how many requests without their first token are let in for each NPU that encodes or computes prompts; 0 means 32, as
	// many prompts as one works on at once. The others wait where they are put in order.
	Ahead int

	Deadline   time.Duration // longest life of a request; 0 means 10 min
	WriteWait  time.Duration // longest time for which a client may read nothing; 0 means 10 s
	StoreWait  time.Duration // longest time for which NATS may store nothing before requests that need it fail; 0 means 30 s
	BodyWait   time.Duration // longest time for a request's body to arrive; 0 means 2 min
	Grace      time.Duration // after Run's ctx has ended, open requests may go on for so long; 0 means not at all
	Notice     time.Duration // and before that, new ones are still taken for so long, although health says no
	Attempts   int           // tries of a request; 0 means 3
	Inbox      int           // messages of stages that wait in this process at most; what is beyond is lost, and asked for again; 0 means 65,536
	ResendWait time.Duration // time after which missing tokens are asked for again, doubling; 0 means 50 ms

	// DeadLetters says what is stored of requests that fail for good and not by their clients' fault: DeadWhole, DeadFacts or DeadOff;
	// "" means DeadWhole. Then their bodies, and pictures that were fetched for them, are kept for as long as they are in work.
	DeadLetters string

	AckWait  time.Duration // see bus.WithAckWait, the same for all services on one NATS; 0: the bus' default
	Replicas int           // see bus.WithReplicas, the same for all services on one NATS; 0: automatic

	// ConfirmWait is the longest time between the end of an answer and the end of the request, for decoders to have the
	// end confirmed; 0 means 2 s.
	ConfirmWait time.Duration
}

// What Config.Late says.
const (
	LateRefuse = "refuse"
	LateLast   = "last"
)

// withDefaults fills in what is zero.
func (c Config) withDefaults() Config {
	def(&c.MaxBody, 64<<20)
	def(&c.MaxPixels, imageprep.DecodeLimit)
	def(&c.MaxOpen, 1024)
	def(&c.MaxQueue, 1024)
	def(&c.QueueWait, 30*time.Second)
	def(&c.Deadline, 10*time.Minute)
	def(&c.WriteWait, 10*time.Second)
	def(&c.StoreWait, 30*time.Second)
	def(&c.BodyWait, 2*time.Minute)
	def(&c.Attempts, 3)
	def(&c.Policy, sched.SLO.String())
	def(&c.Late, LateLast)
	def(&c.DeadLetters, DeadWhole)
	def(&c.Ahead, 32)
	def(&c.Inbox, 64<<10)
	c.Classes = withClasses(c.Classes)
	def(&c.ResendWait, 50*time.Millisecond)
	def(&c.ConfirmWait, 2*time.Second)
	if c.Instance == "" {
		c.Instance = "gateway-" + newID()[:8]
	}
	return c
}

func def[T comparable](v *T, value T) {
	var zero T
	if *v == zero {
		*v = value
	}
}

// Validate reports every fault of the configuration.
func (c Config) Validate() error {
	var errs []error
	fault := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for one := range strings.SplitSeq(c.NATSURL, ",") {
		if u, err := url.Parse(strings.TrimSpace(one)); err != nil || u.Host == "" {
			fault(true, "NATS URL %q is not like nats://host:port, or several of a cluster with commas between", bus.Redacted(c.NATSURL))
		}
	}
	for _, h := range c.Media.AllowHosts {
		if err := media.CheckHost(h); err != nil {
			errs = append(errs, err)
		}
	}
	fault(c.HTTP == "", "no address to listen on")
	fault(c.HMMSocket == "", "no HMM socket")
	fault(c.ModelDir == "", "no model folder")
	for _, limit := range []struct {
		name string
		is   int64
	}{
		{"max-body", c.MaxBody}, {"max-pixels", int64(c.MaxPixels)}, {"max-open", int64(c.MaxOpen)}, {"max-queue", int64(c.MaxQueue)},
		{"attempts", int64(c.Attempts)}, {"ahead", int64(c.Ahead)}, {"inbox", int64(c.Inbox)}, {"replicas", int64(c.Replicas)},
	} {
		fault(limit.is < 0, "%s is %d, a limit cannot be negative", limit.name, limit.is)
	}
	fault(c.MaxPixels > imageprep.DecodeLimit, "pictures of %d pixels are more than encoders decode, %d", c.MaxPixels, imageprep.DecodeLimit)
	for _, wait := range []struct {
		name string
		is   time.Duration
	}{
		{"queue-wait", c.QueueWait}, {"deadline", c.Deadline}, {"write wait", c.WriteWait}, {"store wait", c.StoreWait}, {"body wait", c.BodyWait},
		{"grace", c.Grace}, {"notice", c.Notice}, {"resend wait", c.ResendWait}, {"confirm wait", c.ConfirmWait}, {"ack-wait", c.AckWait},
	} {
		fault(wait.is < 0, "%s is %v, a time cannot be negative", wait.name, wait.is)
	}
	fault(!slices.Contains([]string{"", DeadWhole, DeadFacts, DeadOff}, c.DeadLetters), "dead letters are %s, %s or %s, not %q",
		DeadWhole, DeadFacts, DeadOff, c.DeadLetters)
	errs = append(errs, CheckAccess(c.Keys, c.Origins), c.checkOrder())
	return errors.Join(errs...)
}
