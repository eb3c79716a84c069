package act

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
)

// Cluster is a Kubernetes cluster, as a pod sees it. What is empty is as in a pod with a service account.
type Cluster struct {
	API       string // https://host:port
	Account   string // folder with token, ca.crt and namespace
	Namespace string // of the targets
	// Targets are what has the pods of instances, by their roles: D is deployments/decoder; nil: DefaultTargets. Where commands for docker compose
	// are told they are its services: D is decoder, one of several roles is by default that of the first.
	Targets map[string]string
	// Patience is for how long a refusal is asked about again before it is believed: an API server that has just started refuses what is
	// allowed, until it has read the roles and accounts; 0: 10 seconds.
	Patience time.Duration
}

// DefaultTargets are the Deployments that pods of the three kinds of instances are of.
var DefaultTargets = map[string]string{"E": "deployments/encoder", "P": "deployments/prefill", "D": "deployments/decoder"}

// ErrNoCluster is returned by New where Kubernetes is wanted and this is no pod of it.
var ErrNoCluster = errors.New("this is no pod with a service account")

const (
	accountFolder = "/var/run/secrets/kubernetes.io/serviceaccount"
	callMost      = 10 * time.Second
	answerMost    = 1 << 20
)

// pods has Kubernetes start and stop processes: it changes the number of replicas of what they are pods of, by the scale subresource.
// Which pod ends, and on which node one starts, Kubernetes chooses. The resource version makes a change a compare-and-set, so that
// one that a scaler before has sent, and that comes late, is refused.
type pods struct {
	cfg   *Config
	beats *bus.Instances
}

// inPod reports whether this process runs in a pod with a service account.
func inPod() bool {
	_, err := os.Stat(filepath.Join(accountFolder, "token"))
	return err == nil && os.Getenv("KUBERNETES_SERVICE_HOST") != ""
}

// newPods fills in what Config.Cluster leaves out.
func newPods(cfg *Config, beats *bus.Instances) (*pods, error) {
	c := &cfg.Cluster
	if c.API == "" {
		host := os.Getenv("KUBERNETES_SERVICE_HOST")
		if host == "" {
			return nil, fmt.Errorf("%w: KUBERNETES_SERVICE_HOST is not set", ErrNoCluster)
		}
		c.API = "https://" + net.JoinHostPort(host, cmp.Or(os.Getenv("KUBERNETES_SERVICE_PORT"), "443"))
	}
	c.Account = cmp.Or(c.Account, accountFolder)
	if c.Namespace == "" {
		name, err := os.ReadFile(filepath.Join(c.Account, "namespace"))
		if err != nil {
			return nil, fmt.Errorf("%w: reading its namespace: %w", ErrNoCluster, err)
		}
		c.Namespace = strings.TrimSpace(string(name))
	}
	if c.Targets == nil {
		c.Targets = DefaultTargets
	}
	for roles, target := range c.Targets {
		kind, name, ok := strings.Cut(target, "/")
		if !ok || name == "" || strings.ContainsAny(name, "/?#%") || !slices.Contains([]string{"deployments", "statefulsets"}, kind) {
			return nil, fmt.Errorf("target %q of instances %s: write deployments/NAME or statefulsets/NAME", target, roles)
		}
	}
	c.Patience = cmp.Or(c.Patience, 10*time.Second)
	if _, err := c.client(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoCluster, err)
	}
	return &pods{cfg: cfg, beats: beats}, nil
}

// client makes a client for one request: the certificate is replaced from time to time, and a connection that is kept may be to an API
// server that is gone.
func (c *Cluster) client() (*http.Client, error) {
	file := filepath.Join(c.Account, "ca.crt")
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the cluster's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate", file)
	}
	return &http.Client{Timeout: callMost, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true,
	}}, nil
}

// token is what the API server knows the service account by; it, too, is replaced from time to time.
func (c *Cluster) token() (string, error) {
	file := filepath.Join(c.Account, "token")
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading the service account's token: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" { // the API server would speak of what somebody anonymous may do
		return "", fmt.Errorf("the service account's token is empty: %s", file)
	}
	return token, nil
}

// scale is autoscaling/v1 Scale, as far as it is used.
type scale struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Spec struct {
		Replicas int `json:"replicas"`
	} `json:"spec"`
}

// statusError is an answer of the API server that is none of what was asked for.
type statusError struct {
	code int
	said string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("Kubernetes answers %d: %s", e.code, cmp.Or(e.said, http.StatusText(e.code)))
}

// ready is how many instances with certain roles take work.
func ready(beats *bus.Instances, roles string) (n int) {
	for _, i := range beats.Named() {
		if letters(i.Role) == roles && len(i.NPUs) > 0 && i.Ready {
			n++
		}
	}
	return n
}

// call reads the scale of a target, or patches it.
func (p *pods) call(ctx context.Context, method, target string, patch any) (*scale, error) {
	c := &p.cfg.Cluster
	var body io.Reader
	if patch != nil {
		data, err := json.Marshal(patch)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("%s/apis/apps/v1/namespaces/%s/%s/scale", c.API, c.Namespace, target), body)
	if err != nil {
		return nil, err
	}
	token, err := c.token()
	if err != nil {
		return nil, err
	}
	client, err := c.client()
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "trireme-scaler") // which the audit log has
	if patch != nil {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, answerMost))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		var status struct{ Message string }
		_ = json.Unmarshal(data, &status) // a proxy may say something else
		return nil, &statusError{resp.StatusCode, status.Message}
	}
	s := new(scale)
	if err := json.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("reading the scale of %s: %w", target, err)
	}
	return s, nil
}

// able implements starter.
func (p *pods) able(_ context.Context, _, roles string, more int) (string, bool) {
	if p.cfg.Cluster.Targets[roles] != "" {
		return "", true
	}
	return fmt.Sprintf("kubectl scale --replicas=%d of what has the pods of instances %s: say with --target %s=deployments/NAME what that is, and it is done here",
		max(0, count(p.beats, "", roles)+more), roles, roles), false
}

// goal is what is noted of an operation before Kubernetes is asked.
type goal struct {
	Target string `json:"target"`
	From   int    `json:"from"`  // replicas
	To     int    `json:"to"`    // "
	Ready  int    `json:"ready"` // instances of the roles that took work, then
}

// start implements starter.
func (p *pods) start(ctx context.Context, term *lead.Term, op *lead.Operation, _ string) (Outcome, error) {
	n := max(1, op.Change.Count)
	g, out, err := p.to(ctx, term, op, n)
	if err != nil || !out.Done {
		return out, err
	}
	bounded, cancel := context.WithTimeout(ctx, p.cfg.Ready)
	defer cancel()
	if err = until(bounded, p.beats, func() bool { return ready(p.beats, op.Change.Roles) >= g.Ready+n }); err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		return out, err
	}
	why := fmt.Sprintf("of the replicas %d to %d of %s not all were ready within %v", g.From+1, g.To, g.Target, p.cfg.Ready)
	back, err := p.swap(ctx, term, g.Target, g.To, g.From)
	if !back.Done {
		why += ", and they stay: " + back.Why
	}
	return Outcome{Why: why}, err
}

// stop implements starter.
func (p *pods) stop(ctx context.Context, term *lead.Term, op *lead.Operation, _ string) (Outcome, error) {
	g, out, err := p.to(ctx, term, op, -1)
	if err != nil || !out.Done {
		return out, err
	}
	bounded, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
	defer cancel()
	err = until(bounded, p.beats, func() bool { return ready(p.beats, op.Change.Roles) < g.Ready })
	if err != nil && ctx.Err() == nil {
		out.Why, err = fmt.Sprintf("a replica of %s was to end and has not within %v", g.Target, p.cfg.Timeout), nil
	}
	return out, err
}

// to has so many more replicas, or fewer, once: how many there are to be is noted before Kubernetes is asked.
func (p *pods) to(ctx context.Context, term *lead.Term, op *lead.Operation, more int) (g goal, out Outcome, err error) {
	if op.Note == nil {
		g.Target = p.cfg.Cluster.Targets[op.Change.Roles]
		if g.Target == "" {
			return g, Outcome{Why: fmt.Sprintf("it is not said what has the pods of instances %s; said is it of %v", op.Change.Roles,
				slices.Sorted(maps.Keys(p.cfg.Cluster.Targets)))}, nil
		}
		// Nothing was asked for yet, so that other changes need not wait for an API server that is away.
		why := fmt.Errorf("nothing has come of it within %v", p.cfg.Timeout)
		bounded, cancel := context.WithTimeoutCause(ctx, p.cfg.Timeout, why)
		defer cancel()
		s, out, err := p.persist(bounded, term, http.MethodGet, g.Target, nil)
		if errors.Is(err, why) {
			return g, Outcome{Why: err.Error()}, nil
		}
		if s == nil {
			return g, out, err
		}
		g.From, g.To, g.Ready = s.Spec.Replicas, s.Spec.Replicas+more, ready(p.beats, op.Change.Roles)
		if op.Note, err = json.Marshal(&g); err != nil {
			return g, Outcome{}, err
		}
		if err := term.Note(ctx, op); err != nil {
			return g, Outcome{}, err
		}
	} else if err := json.Unmarshal(op.Note, &g); err != nil {
		return g, Outcome{Why: fmt.Sprintf("what was noted of it cannot be read: %v", err)}, nil
	}
	if g.To < 0 {
		return g, Outcome{Why: g.Target + " has no replicas"}, nil
	}
	out, err = p.swap(ctx, term, g.Target, g.From, g.To)
	return g, out, err
}

// swap changes the number of replicas from one to another, unless it is that already, or a third.
func (p *pods) swap(ctx context.Context, term *lead.Term, target string, from, to int) (Outcome, error) {
	for {
		s, out, err := p.persist(ctx, term, http.MethodGet, target, nil)
		switch {
		case s == nil:
			return out, err
		case s.Spec.Replicas == to:
			return Outcome{Done: true}, nil
		case s.Spec.Replicas != from:
			return Outcome{Why: fmt.Sprintf("somebody else scales %s: it had %d replicas and has %d, where %d were wanted", target, from, s.Spec.Replicas, to)}, nil
		}
		patch := scale{Metadata: s.Metadata}
		patch.Spec.Replicas = to
		if s, out, err = p.persist(ctx, term, http.MethodPatch, target, &patch); s == nil && !out.Done {
			return out, err
		}
		// Done, or somebody has written in between: the next look tells.
	}
}

// refusal is why the API server does not let the scaler do it, with the remedy; "": it does.
func (p *pods) refusal(status *statusError, target string) string {
	switch {
	case status == nil:
		return ""
	case status.code == http.StatusUnauthorized:
		return fmt.Sprintf("%v; the service account's token has expired, or the account is gone: %s", status, filepath.Join(p.cfg.Cluster.Account, "token"))
	case status.code == http.StatusForbidden:
		kind, name, _ := strings.Cut(target, "/")
		return fmt.Sprintf("%v; if that is RBAC, the scaler's service account needs the verbs get and patch of %s/scale of %q: see deploy/kubernetes/scaler.yaml",
			status, kind, name)
	}
	return ""
}

// persist calls, again while that may help. Without a scale the outcome says why, or that it is to be looked at again (Done).
func (p *pods) persist(ctx context.Context, term *lead.Term, method, target string, patch any) (*scale, Outcome, error) {
	level := slog.LevelWarn // once: an operation that waits keeps all others waiting
	var refused time.Time   // since when every answer was that
	for {
		if err := term.Check(); err != nil {
			return nil, Outcome{}, err
		}
		s, err := p.call(ctx, method, target, patch)
		var status *statusError
		answered := errors.As(err, &status)
		refusal := p.refusal(status, target)
		switch {
		case err == nil:
			return s, Outcome{}, nil
		case answered && status.code == http.StatusConflict:
			return nil, Outcome{Done: true}, nil
		case answered && refusal == "" && status.code < 500 && status.code != http.StatusTooManyRequests:
			return nil, Outcome{Why: fmt.Sprintf("scaling %s in namespace %s: %v", target, p.cfg.Cluster.Namespace, err)}, nil
		case refusal == "":
			refused = time.Time{}
		case refused.IsZero():
			refused = time.Now()
		case time.Since(refused) >= p.cfg.Cluster.Patience:
			return nil, Outcome{Why: refusal}, nil
		}
		p.cfg.Log.Log(ctx, level, "Kubernetes does not do what it is asked for; it is asked again", "method", method, "target", target, "error", err)
		level = slog.LevelDebug
		select {
		case <-time.After(askAgain):
		case <-ctx.Done():
			return nil, Outcome{}, fmt.Errorf("scaling %s: %w: %w", target, context.Cause(ctx), err)
		}
	}
}
