package gateway

import (
	"encoding/hex"
	"fmt"
	"net/http"

	"github.com/labstack/echo/v4"

	"trireme.dev/shared/wire"
)

// missing lists what keeps a request from succeeding, nothing when it would.
func (g *Gateway) missing() []string {
	var out []string
	if g.doors.isStopping() {
		out = append(out, "the gateway is stopping")
	}
	if !g.bus.Conn().IsConnected() {
		out = append(out, "no connection to NATS")
	}
	if !g.memory.up() {
		out = append(out, "no connection to the HMM")
	}
	roles := []string{"encode", "prefill", "decode"}
	if g.model.Config.Vision == nil {
		roles = roles[1:]
	}
	digest := hex.EncodeToString(g.model.Config.Digest[:])
	for _, role := range roles {
		ready, other := 0, 0
		for _, i := range g.serving(role) {
			switch {
			case !i.Ready:
			case i.Digest == digest:
				ready++
			default:
				other++
			}
		}
		if ready == 0 {
			why := fmt.Sprintf("no %s instance is ready", role)
			if other > 0 {
				why += fmt.Sprintf(" with this model (%d with another)", other)
			}
			out = append(out, why)
		}
	}
	return out
}

// health is 200 only when a request would succeed.
func (g *Gateway) health(c echo.Context) error {
	body := struct {
		Status  string   `json:"status"`
		Missing []string `json:"missing,omitempty"`
		Paced   []string `json:"paced,omitempty"`
	}{Status: "ok", Missing: g.missing(), Paced: g.paced()}
	if len(body.Missing) > 0 {
		body.Status = "unavailable"
		return c.JSON(http.StatusServiceUnavailable, &body)
	}
	return c.JSON(http.StatusOK, &body)
}

// live is 200 as long as the process answers.
func (g *Gateway) live(c echo.Context) error {
	return c.JSON(http.StatusOK, map[string]string{"status": "ok"})
}

// heartbeat is what the gateway says of itself.
func (g *Gateway) heartbeat() wire.Instance {
	open, _ := g.gate.Load()
	return wire.Instance{
		ID: g.cfg.Instance, Role: "gateway", Node: g.node, PID: g.pid, Ready: !g.doors.isStopping(),
		Model: g.name, Digest: hex.EncodeToString(g.model.Config.Digest[:]), Running: open, Metrics: g.address,
		Waiting: g.gate.Waiting(),
	}
}
