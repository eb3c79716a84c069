package wire

import (
	"fmt"
	"strings"
)

// Streams and their one permanent consumer each: work queues, a message leaves on ack. Names explain themselves in
// JetStream's monitoring.
const (
	StreamEncode  = "TRIREME_ENCODE"
	StreamPrefill = "TRIREME_PREFILL"
	StreamDecode  = "TRIREME_DECODE"

	ConsumerEncode  = "encoders"
	ConsumerPrefill = "prefills"
	ConsumerDecode  = "decoders"
)

// Key-value buckets.
const (
	BucketJoin      = "trireme_join"      // join records by JoinKey
	BucketInstances = "trireme_instances" // heartbeats (Instance as JSON) by InstanceKey; bucket TTL InstanceTTL
	BucketScaler    = "trireme_scaler"    // which scaler leads, and what it has under way (services/scaler/lead)
)

// Partitions is the number of partitions of each stage's subjects; a request's partition is a hash of its id.
const Partitions = 64

// Subjects without a variable part: core NATS, everyone listens who must.
const (
	SubjectDone = "trireme.request.done" // Done
	SubjectGone = "trireme.gone"         // Gone
	SubjectHMM  = "trireme.hmm.stats"    // request/reply, every HMM answers with hbm stats as JSON

	SubjectReach = "trireme.hmm.reach" // Reach, every HMM answers with Reached

	SubjectScaler = "trireme.scaler.status" // request/reply, every scaler answers with its status as JSON (services/scaler/explain)
)

// StageSubject is the work subject of a stage ("encode", "prefill", "decode") for a request: trireme.encode.p07.
func StageSubject(stage, request string) string {
	h := uint32(2166136261) // FNV-1a, 32 bits
	for i := range len(request) {
		h = (h ^ uint32(request[i])) * 16777619
	}
	return fmt.Sprintf("trireme.%s.p%02d", stage, h%Partitions)
}

// StageSubjects is the filter that covers a stage's partitions.
func StageSubjects(stage string) string { return "trireme." + stage + ".*" }

// SubjectTokens is where a gateway listens for Tokens.
func SubjectTokens(gateway string) string { return "trireme.gateway." + gateway + ".tokens" }

// SubjectConfirm is where a gateway answers Confirm.
func SubjectConfirm(gateway string) string { return "trireme.gateway." + gateway + ".confirm" }

// SubjectLost is where a gateway listens for Lost.
func SubjectLost(gateway string) string { return "trireme.gateway." + gateway + ".lost" }

// SubjectResend is where a stage instance listens for Resend.
func SubjectResend(instance string) string { return "trireme.instance." + instance + ".resend" }

// SubjectOffer is where a stage instance listens for Offer.
func SubjectOffer(instance string) string { return "trireme.instance." + instance + ".offer" }

// SubjectNodeOffer is where the instances of a node that have a role listen for Offer: each goes to one of them.
func SubjectNodeOffer(node, role string) string {
	return "trireme.node." + node + "." + role + ".offer"
}

// JoinKey is the key of the join record of a request and attempt.
func JoinKey(request string, attempt int) string { return fmt.Sprintf("%s.%d", request, attempt) }

// GatewayKeys are the keys of gateways' heartbeats, a pattern.
const GatewayKeys = "gateway.*"

// InstanceKey is the key of an instance's heartbeat: what watchers tell apart, and its id.
func InstanceKey(i *Instance) string {
	if i.Role == "gateway" {
		return "gateway." + i.ID
	}
	return "stage." + i.ID
}

// JoinRequest is the request that a JoinKey is of.
func JoinRequest(key string) string {
	request, _, _ := strings.Cut(key, ".")
	return request
}
